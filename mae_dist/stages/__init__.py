"""What makes a run: one file a stage. A stage builds a task; `train.fit` is the only loop."""
