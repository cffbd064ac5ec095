"""The segmentor contract and the parts that methods share."""
