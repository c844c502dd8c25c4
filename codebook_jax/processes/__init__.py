"""The processes of one run, on one machine or on many.

joining.py finds out who belongs together and connects them, peers.py has them compare what has to be the same and ends
all when one is lost, agreement.py has them stop at the same step.
"""
