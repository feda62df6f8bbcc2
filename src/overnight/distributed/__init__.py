"""Processes: launching them, collectives between them, and a watchdog over them."""
