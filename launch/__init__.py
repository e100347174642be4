"""Submitting runs to SLURM: what `python launch/submit.py` is made of. submitit is known here and nowhere else."""
