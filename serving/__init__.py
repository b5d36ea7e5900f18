"""What a consumer of an artifact needs: expert lookup, export and router inference. Imports storage only."""
