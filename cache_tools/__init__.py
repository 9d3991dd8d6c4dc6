"""The waist: everything both stages agree on, down to the byte. No torch here."""
