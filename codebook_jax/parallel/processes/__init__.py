"""The processes of one run, on one machine or on many.

joining.py finds the processes of a run and connects them, peers.py lets them compare what must be
the same and ends all of them if one is lost, agreement.py makes them stop at the same step.
"""
