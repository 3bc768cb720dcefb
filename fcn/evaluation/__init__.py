"""Evaluation of a checkpoint: scores per image and near boundaries, tables, and the report.

evaluate.py puts the parts together.
"""
