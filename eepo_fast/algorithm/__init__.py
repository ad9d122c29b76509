"""What a paper is about, and nothing else: an iteration and its parts."""
