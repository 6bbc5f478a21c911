"""The parts of `check`: each looks at a copy of a model on one batch and notes what it finds."""
