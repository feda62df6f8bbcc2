"""What a user asks for: each stage is one Config and one run(), readable as a table of contents."""
