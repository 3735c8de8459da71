"""Generated images, and the stages in plain torch that the demo and the benchmarks compare with."""
