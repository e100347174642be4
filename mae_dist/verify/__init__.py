"""Proof and measurement: certify, chaos, bench and their parts. Each run is a process, as a user starts it."""
