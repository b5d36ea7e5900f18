"""Entry points: the command line and the Prefect flows."""
