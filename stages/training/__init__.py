"""The student: streaming, objective, training, evaluation, export."""
