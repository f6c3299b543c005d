"""The averages that the two papers print, recomputed from the numbers beside them."""

from statistics import mean

import pytest


# Ding et al., "Mastering Text, Code and Math Simultaneously via Fusing Highly Specialized Language Models",
# arXiv 2403.08281, tables as numbered in the ACL 2025 version.
# Table 1: TruthfulQA, AlpacaEval, HumanEval, GSM8K, MATH, SAT-Math, AQuA-RAT; then the average as printed
MAIN = {
    "UltraLM-2": ((58.82, 83.23, 25.61, 25.09, 4.48, 25.00, 25.98), 35.46),
    "CodeLlama": ((56.89, 69.21, 48.78, 23.12, 6.16, 27.73, 25.59), 36.78),
    "WizardMath": ((26.81, 51.50, 10.98, 56.18, 12.2, 29.55, 22.05), 29.91),
    "best specialist per task": ((58.82, 83.23, 48.78, 56.18, 12.20, 29.55, 25.98), 44.96),
    "UltraLM-2, tuned": ((58.82, 73.34, 40.24, 54.59, 10.46, 25.00, 28.74), 41.60),
    "CodeLlama, tuned": ((41.02, 17.90, 31.71, 13.42, 5.34, 17.73, 25.20), 21.76),
    "WizardMath, tuned": ((50.17, 61.25, 26.83, 52.08, 9.98, 29.55, 28.74), 36.94),
    "best tuned per task": ((58.82, 73.34, 40.24, 54.59, 10.46, 29.55, 28.74), 42.25),
    "Llama-30B, tuned": ((46.99, 65.33, 38.41, 52.31, 8.88, 35.00, 32.28), 40.03),
    "Task Arithmetic": ((12.99, 1.75, 0.00, 3.71, 1.46, 3.64, 0.79), 3.48),
    "Average Merging": ((53.62, 67.08, 25.00, 51.48, 12.06, 25.91, 18.90), 36.29),
    "BTX": ((34.82, 9.76, 20.73, 11.14, 4.14, 21.82, 20.47), 17.55),
    "FuseChat": ((64.98, 74.77, 27.44, 27.90, 5.54, 15.91, 12.20), 32.68),
    "UltraFuser": ((64.67, 82.35, 53.03, 54.59, 11.36, 30.00, 26.38), 47.48),
}
# Table 9: the same, tuned on public data only
PUBLIC = {
    "UltraLM-2, tuned": ((59.72, 75.79, 27.44, 39.04, 4.80, 23.18, 28.74), 36.96),
    "CodeLlama, tuned": ((57.92, 18.39, 32.32, 19.03, 4.12, 20.45, 23.62), 25.12),
    "WizardMath, tuned": ((43.10, 41.47, 19.51, 42.38, 6.10, 20.45, 19.29), 27.47),
    "Llama-30B, tuned": ((54.13, 62.55, 29.88, 49.36, 8.98, 30.91, 31.50), 38.19),
    "BTX": ((13.52, 6.35, 15.85, 6.97, 3.04, 12.73, 14.17), 10.38),
    "UltraFuser": ((65.35, 72.68, 45.73, 57.16, 11.64, 32.73, 30.71), 45.14),
}
# Table 8: means over two text, one code and four mathematics benchmarks, and over all seven as printed
GROUPS = {
    "WizardMath": (39.15, 10.98, 29.995, 29.91),
    "WizardMath, tuned on its subset": (46.66, 17.68, 30.31, 33.17),
    "CodeLlama": (63.05, 48.78, 20.65, 36.78),
    "CodeLlama, tuned on its subset": (65.05, 50.62, 21.38, 38.03),
    "UltraFuser": (73.51, 53.03, 30.58, 47.48),
}
# Table 4: means over 12 checkpoints of balanced training
CHECKPOINTS = {"TruthfulQA": 59.91, "HumanEval": 53.68, "GSM8K": 53.77}
# Tables 5 and 7, MT-Bench: eight categories, then the overall score as printed
MT_BENCH = {
    "UltraLM-2": (8.83, 7.98, 5.20, 2.90, 4.00, 6.74, 8.08, 9.46, 6.62),
    "CodeLlama": (5.80, 7.10, 3.80, 3.05, 3.43, 5.36, 5.65, 7.05, 5.16),
    "WizardMath": (7.75, 7.03, 4.80, 3.85, 3.50, 4.65, 7.65, 9.13, 6.04),
    "UltraLM-2, tuned": (7.85, 7.60, 4.30, 4.48, 5.20, 5.78, 8.32, 9.40, 6.62),
    "CodeLlama, tuned": (7.33, 6.60, 3.85, 2.25, 3.68, 5.20, 4.68, 5.10, 4.84),
    "WizardMath, tuned": (7.18, 6.90, 4.95, 4.25, 4.55, 5.18, 7.55, 7.98, 6.07),
    "Llama-30B, tuned": (5.45, 4.70, 4.75, 3.55, 3.05, 2.95, 4.00, 5.40, 4.24),
    "Average Merging": (7.28, 7.06, 5.05, 4.00, 3.68, 6.18, 7.93, 8.90, 6.26),
    "Task Arithmetic": (1.80, 2.70, 2.05, 1.15, 0.90, 1.00, 1.81, 2.00, 1.68),
    "BTX": (2.89, 3.58, 2.45, 2.20, 2.43, 2.00, 3.03, 2.40, 2.62),
    "FuseChat": (7.55, 7.05, 5.08, 2.40, 3.53, 6.60, 7.03, 8.99, 6.03),
    "one of three answers, by ArmoRM": (8.23, 7.79, 4.13, 4.45, 4.75, 7.55, 8.53, 9.43, 6.84),
    "one of three answers, by GPT-4o": (8.35, 7.90, 5.30, 4.00, 5.13, 6.65, 8.38, 8.99, 6.84),
    "UltraFuser": (8.60, 8.11, 5.00, 5.15, 5.10, 6.53, 8.23, 9.43, 7.02),
}

# Wu et al., "Mixture-of-Skills: Learning to Optimize Data Usage for Fine-Tuning Large Language Models", arXiv 2406.08811.
# Table 2: mean of both; MMLU, its mathematics, medicine and others; MT-bench, its first turn and its second
SKILLS = {
    "Qwen1.5-0.5B": {
        "PROP": (32.82, 30.95, 23.40, 31.30, 31.76, 3.47, 4.18, 2.76),
        "TEMP": (34.17, 32.09, 22.88, 30.88, 33.41, 3.63, 4.11, 3.14),
        "UNI": (33.81, 31.52, 21.45, 29.97, 33.02, 3.61, 4.21, 3.01),
        "MultiDDS": (33.67, 31.02, 22.84, 30.28, 33.01, 3.63, 4.13, 3.14),
        "MultiUAT": (34.15, 31.24, 21.41, 29.91, 33.01, 3.71, 4.26, 3.15),
        "CosSim": (34.30, 31.95, 21.90, 31.18, 33.28, 3.67, 3.96, 3.38),
        "CosSim+EMA": (35.13, 32.45, 22.27, 31.56, 33.82, 3.78, 4.44, 3.13),
        "Diff": (34.24, 31.49, 20.71, 29.94, 33.07, 3.70, 4.21, 3.19),
        "Diff+EMA": (34.83, 32.11, 21.84, 31.01, 33.53, 3.76, 4.11, 3.40),
    },
    "Gemma-2B": {
        "PROP": (42.90, 33.61, 20.03, 33.33, 35.25, 5.22, 5.63, 4.81),
        "TEMP": (41.86, 36.16, 21.03, 37.92, 37.55, 4.76, 5.49, 4.03),
        "UNI": (43.95, 35.95, 20.82, 35.97, 37.71, 5.19, 5.60, 4.79),
        "MultiDDS": (41.11, 34.59, 20.33, 33.17, 34.55, 4.76, 5.48, 4.05),
        "MultiUAT": (43.19, 33.95, 20.85, 34.64, 33.71, 5.24, 5.61, 4.88),
        "CosSim": (43.84, 32.44, 20.61, 32.35, 33.83, 5.53, 6.16, 4.89),
        "CosSim+EMA": (44.49, 33.86, 20.57, 33.32, 35.52, 5.51, 6.01, 5.01),
        "Diff": (44.93, 34.32, 20.29, 34.06, 36.00, 5.55, 6.04, 5.06),
        "Diff+EMA": (45.10, 34.61, 20.83, 34.64, 36.20, 5.56, 6.13, 4.99),
    },
    "Llama-3-8B": {
        "PROP": (60.97, 56.78, 26.61, 62.03, 59.19, 6.52, 6.96, 6.08),
        "TEMP": (61.40, 56.17, 28.36, 59.64, 58.68, 6.66, 7.04, 6.29),
        "UNI": (60.99, 55.72, 27.65, 60.77, 57.93, 6.63, 7.04, 6.21),
        "MultiDDS": (61.77, 56.65, 28.98, 59.99, 58.88, 6.69, 7.14, 6.24),
        "MultiUAT": (61.18, 55.66, 28.65, 60.48, 57.32, 6.67, 7.05, 6.29),
        "CosSim": (62.49, 56.95, 28.91, 59.91, 59.59, 6.80, 7.11, 6.50),
        "CosSim+EMA": (63.85, 58.08, 27.60, 61.54, 60.90, 6.96, 7.28, 6.65),
        "Diff": (63.00, 57.93, 31.08, 62.65, 60.07, 6.81, 6.98, 6.64),
        "Diff+EMA": (63.26, 58.34, 32.81, 62.21, 60.49, 6.82, 7.34, 6.30),
    },
}
LEARNED = ("CosSim", "CosSim+EMA", "Diff", "Diff+EMA")
# Table 3, Llama-3-8B by temperature of the mix at the start: mean of both, MMLU, MT-bench
PRIORS = {
    ("CosSim+EMA", "1"): (62.49, 56.95, 6.80),
    ("CosSim+EMA", "10"): (63.94, 57.98, 6.99),
    ("CosSim+EMA", "infinite"): (63.85, 58.08, 6.96),
    ("Diff+EMA", "1"): (62.29, 56.51, 6.81),
    ("Diff+EMA", "10"): (63.66, 58.22, 6.91),
    ("Diff+EMA", "infinite"): (63.26, 58.34, 6.82),
}
# Table 5: GSM8K, MATH, mathematics of MMLU, and their mean as printed
SPECIALISED = {
    "TEMP": (49.62, 9.54, 28.36, 29.17),
    "CosSim+EMA": (50.40, 9.78, 27.60, 29.26),
    "Diff+EMA": (49.58, 10.26, 32.81, 30.88),
    "MathLlama": (41.02, 9.76, 30.34, 27.04),
    "MoSpec CosSim+EMA": (51.10, 10.64, 30.16, 30.63),
    "MoSpec Diff+EMA": (52.10, 11.40, 32.24, 31.91),
}
# Table 1: thousands of examples
SIZES = (26.2, 5.2, 9.3, 62.6)


def off(rows, tolerance):
    """Names of rows whose printed mean is further from that of their scores than rounding explains."""
    return {name for name, (scores, printed) in rows.items() if abs(mean(scores) - printed) > tolerance}


def test_the_main_tables_averages_are_those_of_its_scores_but_for_two_rows():
    # a score printed as 12.2 may be off by 0.05, and a seventh of that is in the mean
    assert off(MAIN, 0.017) == {"Llama-30B, tuned", "UltraFuser"}
    assert mean(MAIN["Llama-30B, tuned"][0]) == pytest.approx(39.89, abs=0.005)


def test_ultrafusers_47_48_is_46_05():
    text, code, mathematics, _ = GROUPS["UltraFuser"]
    assert mean(MAIN["UltraFuser"][0]) == pytest.approx(46.05, abs=0.005)
    assert (2 * text + code + 4 * mathematics) / 7 == pytest.approx(46.05, abs=0.005)


def test_47_48_is_what_a_sat_score_of_40_would_give_and_the_paper_elsewhere_counts_with_30():
    scores = list(MAIN["UltraFuser"][0])
    assert mean(scores[3:]) == pytest.approx(GROUPS["UltraFuser"][2], abs=0.01)
    scores[5] = 40.00
    assert mean(scores) == pytest.approx(47.48, abs=0.005)


def test_the_margin_over_the_best_specialist_per_task_is_1_1_and_not_2_5():
    columns = zip(*(MAIN[name][0] for name in ("UltraLM-2", "CodeLlama", "WizardMath")), strict=True)
    best = mean(map(max, columns))
    assert best == pytest.approx(MAIN["best specialist per task"][1], abs=0.01)
    assert mean(MAIN["UltraFuser"][0]) - best == pytest.approx(1.1, abs=0.05)
    assert MAIN["UltraFuser"][1] - best == pytest.approx(2.5, abs=0.05)


def test_checkpoint_means_instead_of_picked_checkpoints_leave_a_margin_of_0_4():
    scores = list(MAIN["UltraFuser"][0])
    scores[0], scores[2], scores[3] = CHECKPOINTS.values()
    assert mean(scores) == pytest.approx(45.35, abs=0.005)
    assert mean(scores) - mean(MAIN["best specialist per task"][0]) == pytest.approx(0.4, abs=0.05)


def test_every_humaneval_score_is_a_share_of_164_problems_but_53_03_which_must_be_53_05():
    shares = {round(100 * solved / 164, 2) for solved in range(165)}
    scores = [scores[2] for table in (MAIN, PUBLIC) for scores, _ in table.values()]
    assert {score for score in scores if score not in shares} == {53.03}
    assert round(100 * 87 / 164, 2) == 53.05


def test_every_average_on_public_data_is_right_ultrafusers_45_14_too():
    assert off(PUBLIC, 0.01) == set()


def test_averages_over_groups_are_those_of_the_seven_but_for_ultrafuser():
    rows = {name: ((text, text, code, *[maths] * 4), printed) for name, (text, code, maths, printed) in GROUPS.items()}
    assert off(rows, 0.017) == {"UltraFuser"}


def test_mt_bench_scores_are_means_of_their_categories_but_for_two_rows():
    rows = {name: (scores[:-1], scores[-1]) for name, scores in MT_BENCH.items()}
    assert off(rows, 0.01) == {"UltraLM-2", "one of three answers, by ArmoRM"}


def test_skills_means_over_mmlu_subjects_fail_for_the_learned_baselines_and_for_no_other_row():
    # 57 subjects: 5 of mathematics, 9 of medicine, 43 others
    rows = {
        (model, name): ((row[2],) * 5 + (row[3],) * 9 + (row[4],) * 43, row[1])
        for model, table in SKILLS.items()
        for name, row in table.items()
    }
    assert off(rows, 0.01) == {(model, name) for model in SKILLS for name in ("MultiDDS", "MultiUAT")}


def test_skills_means_of_both_benchmarks_and_of_both_turns_are_right():
    rows = {(model, name): row for model, table in SKILLS.items() for name, row in table.items()}
    # MT-bench counts ten times and is rounded to 0.01
    assert off({key: ((row[1], 10 * row[5]), row[0]) for key, row in rows.items()}, 0.033) == set()
    assert off({key: (row[6:], row[5]) for key, row in rows.items()}, 0.01) == set()
    assert off({key: ((mmlu, 10 * turns), both) for key, (both, mmlu, turns) in PRIORS.items()}, 0.033) == set()


def test_skills_means_of_specialised_models_are_right():
    assert off({name: (row[:3], row[3]) for name, row in SPECIALISED.items()}, 0.01) == set()


def test_one_row_by_prior_is_digit_for_digit_one_without_smoothing_under_another_prior():
    both, mmlu, *_, mt_bench, _, _ = SKILLS["Llama-3-8B"]["CosSim"]
    assert PRIORS["CosSim+EMA", "1"] == (both, mmlu, mt_bench)


def test_on_gemma_every_learned_mix_is_worse_at_mmlu_than_both_fixed_flat_ones():
    gemma = SKILLS["Gemma-2B"]
    assert max(gemma[name][1] for name in LEARNED) < min(gemma[name][1] for name in ("TEMP", "UNI"))


def test_two_mixes_within_4_points_of_each_other_differ_by_more_than_two_of_the_three_gains():
    weights = [size**0.1 for size in SIZES]
    assert max(abs(w / sum(weights) - 1 / 4) for w in weights) < 0.04
    difference = max(abs(table["TEMP"][0] - table["UNI"][0]) for table in SKILLS.values())
    gains = [
        max(table[n][0] for n in LEARNED) - max(table[n][0] for n in ("PROP", "TEMP", "UNI"))
        for table in SKILLS.values()
    ]
    assert [round(g, 2) for g in sorted(gains)] == [0.96, 1.15, 2.45]
    assert sorted(gains)[1] < difference < sorted(gains)[2]
