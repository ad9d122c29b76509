"""The policy is a causal language model, its log-probs through the fused head, its gradients and its optimizer.

plain.py is one device, zero.py DeepSpeed's ZeRO over many; both are a `Policy` (module.py), and the trainer never knows
which one it holds.
"""
