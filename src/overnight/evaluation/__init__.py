"""What a model is worth: measured on text it has not seen."""
