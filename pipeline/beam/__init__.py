"""Apache Beam: run a graph on any runner, and transforms that can be reused on their own."""
