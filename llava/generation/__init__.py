"""Generation: questions and images in, answers out, for evaluation, serving and the command line."""
