"""Metrics that equal the official tools, and the evaluator that feeds them."""
