"""What `overnight doctor` looks at before a run: each check by itself, on the model and text it is given."""
