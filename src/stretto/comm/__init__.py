"""Moving data between the ranks of a run: who they are, what they say to each other, and how many bytes it took."""
