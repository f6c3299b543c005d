"""A gate in one word, as commands and recipes say it: "mlp", "mlp:64", "cross:128+calibration"."""

import re


CALIBRATION = "+calibration"
HELP = "Kind of gate, the width of its hidden layer if it has one, and whether it predicts temperatures, too: mlp, "
HELP += "linear+calibration, cross:128+calibration."


def gate_settings(word: str) -> dict:
    """What a word says of a gate, as fields of the configuration.

    Args:
        word: A name in `GATES`, a colon and the width of its hidden layer, "+calibration" for `gate_calibration`.

    Raises:
        ValueError: If there is no such gate.
    """
    # importing models takes seconds, which `--help` need not
    from modeling_ultrafuser.configuration_ultrafuser import WIDEST
    from modeling_ultrafuser.gates_ultrafuser import GATES

    calibrated = word.endswith(CALIBRATION)
    kind, colon, width = word.removesuffix(CALIBRATION).partition(":")
    known = kind in GATES and (GATES[kind].can_calibrate or not calibrated)
    wide_enough = re.fullmatch(r"[1-9][0-9]{0,8}", width) and int(width) <= WIDEST
    if not known or (colon and not (GATES[kind].has_width and wide_enough)):
        wide = [name for name, gate in GATES.items() if gate.has_width]
        able = [name for name, gate in GATES.items() if gate.can_calibrate]
        raise ValueError(
            f"A gate is one of {list(GATES)}; {wide} may say the width of their hidden layer, at most {WIDEST}, as in "
            f"mlp:64, and {able} that they predict temperatures, as in linear{CALIBRATION}. But got {word!r:.100}. Choose "
            f"one of those."
        )
    settings = {"gate": kind, "gate_calibration": calibrated}
    return settings | ({"gate_hidden_size": int(width)} if width else {})
