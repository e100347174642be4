"""The verbs that show runs, during training and afterwards. Nothing in this folder imports torch."""
