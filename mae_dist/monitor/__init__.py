"""Looking at runs while they run and afterwards. Nothing in this folder imports torch."""
