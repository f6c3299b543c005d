"""A gate in one word, as commands and recipes say it: "mlp", "mlp:64", "cross:128+calibration"."""

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
    from modeling_ultrafuser.gates_ultrafuser import GATES

    calibrated = word.endswith(CALIBRATION)
    kind, _, width = word.removesuffix(CALIBRATION).partition(":")
    known = kind in GATES and (GATES[kind].can_calibrate or not calibrated)
    if not known or (width and not (GATES[kind].has_width and width.isdigit() and int(width))):
        wide = [name for name, gate in GATES.items() if gate.has_width]
        able = [name for name, gate in GATES.items() if gate.can_calibrate]
        raise ValueError(
            f"A gate is one of {list(GATES)}; {wide} may say the width of their hidden layer, as in mlp:64, and {able} that "
            f"they predict temperatures, as in linear{CALIBRATION}. But got {word!r}. Choose one of those."
        )
    settings = {"gate": kind, "gate_calibration": calibrated}
    return settings | ({"gate_hidden_size": int(width)} if width else {})
