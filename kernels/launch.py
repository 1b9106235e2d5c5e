"""What every launch of a Triton kernel here says, whatever the version's defaults are."""

# Multiply-adds contract, whatever TRITON_DEFAULT_FP_FUSION says: backward passes compute the
# forward's scores, similarities and activations again and must get the same ones.
FP_FUSION = True
