"""GPU twins of the packed products, in Triton; importing the package alone does not import Triton."""
