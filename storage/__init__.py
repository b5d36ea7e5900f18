"""Bytes and names: checkpoints, the delta store and artifacts. No arithmetic, no orchestration."""
