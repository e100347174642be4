"""mae_dist: masked autoencoder pretraining, probing and fine-tuning on any number of ranks, from ordinary tars."""

__version__ = "0.1.0"
