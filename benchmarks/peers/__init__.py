"""One file a peer: `CASES`, name → function(settings) → job, each at its best settings for the task."""
