"""What serves an idle model: CUDA graphs, other runtimes, pictures."""
