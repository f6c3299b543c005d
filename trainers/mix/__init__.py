"""Domain mixes: how often each domain is drawn.

`mixes` are static, and a learned mix starts from one. To learn a mix, `rewards` measure the domains, `policies` turn the
rewards into the next mix, and `guarded` (in `shares`) bounds it.

Balanced data is hard to beat: the paper on learned mixes (Wu et al., 2024, https://arxiv.org/abs/2406.08811) reports
single runs, and later papers find learned mixes no better than fixed ones in about half of their cases.
"""
