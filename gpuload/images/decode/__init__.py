"""Decode: Encoded, HEADER[N] and windows enter, ragged uint8 pixels in one arena on the device leave, errors by row."""
