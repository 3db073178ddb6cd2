"""Which rooms the parameter `split` enters on its way to samples: `python tools/way.py D_D`, or the folder of any demonstrations.

Called is what `train_coupled` calls for its data, once to record and encode what is missing and once more under a tracer, which notes each room
of the package whose code runs. A stay is a row of calls in one room.
"""
import sys
from collections import Counter
from pathlib import Path

import defi_nb

HOME = Path(defi_nb.__file__).parent


def stays(call):
    "Rooms in the order in which a call enters them; one that is entered again is there again."
    seen = []

    def note(frame, event, arg):
        frame = frame.f_back if event == "return" else frame if event == "call" else None
        if frame is None or not frame.f_code.co_filename.startswith(str(HOME)): return
        room = ".".join(Path(frame.f_code.co_filename).relative_to(HOME).with_suffix("").parts)
        if seen[-1:] != [room]: seen.append(room)

    sys.setprofile(note)
    try: call()
    finally: sys.setprofile(None)
    return seen


def main(split="D_D"):
    from defi_nb.models.encoders import load_encoders
    from defi_nb.run.datasets import policy_data
    from defi_nb.train.config import TrainConfig
    encoders, config = load_encoders("tiny"), TrainConfig(steps=2, batch_size=2)

    def call(): policy_data(split, "latent", encoders, config, 4, 1., "default" if Path(split).exists() else "open_drawer,close_drawer", 4, unchecked=True)

    call()
    way = stays(call)
    for room, count in Counter(way).items(): print(f"{room:24} {count:4} stays")
    data = [room for room in dict.fromkeys(way) if room.split(".")[0] in ("data", "run")]
    print(f"{split}: {len({*way})} rooms, {len(data)} of them of data and run: {', '.join(data)}")


if __name__ == "__main__": main(*sys.argv[1:])
