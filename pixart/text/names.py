"""Names of the precisions that T5's linear layers can be kept in."""
INT8, NF4, FP4, FP8 = "int8", "nf4", "fp4", "fp8_e4m3fn"
STORED_PRECISIONS = (INT8, NF4, FP4)  # that a file can hold
PRECISIONS = (*STORED_PRECISIONS, FP8)  # that layers can be brought to while loading
