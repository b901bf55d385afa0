"""What a column becomes: Arrow enters, finished values leave."""
