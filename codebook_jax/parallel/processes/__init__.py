"""The processes of one run, on one machine or on many.

joining.py finds the processes of a run and connects them, channel.py carries what they say outside
the devices, peers.py compares what must be the same and ends all if one fails or is lost,
agreement.py makes them stop at the same step.
"""
