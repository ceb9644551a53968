"""What trained students are worth on held-out text and in the evaluation harness."""
