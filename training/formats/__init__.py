"""Draft checkpoints in the layouts that public trainers write, one file a layout; layouts.py is the way in.

Knows: config keys and tensor names. Refuses to know: modules, training, targets beyond their number of layers.
"""
