"""The fused CPU path: rows in the checkpoint's type in, rows in the checkpoint's type out, one pass over memory.

Every function takes raw bits whose integer type says what they are: uint16 bfloat16, int16 float16, uint32 float32.
"""
