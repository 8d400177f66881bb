"""placeholder until the counting is written"""
