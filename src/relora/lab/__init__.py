"""The laboratory: methods to compare, and studies that compare them."""
