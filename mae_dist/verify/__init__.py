"""Proof and measurement: certify, chaos, bench, and what they stand on. Each run is a process as a user starts it."""
