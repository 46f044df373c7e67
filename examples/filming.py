"""Several episodes of a robot in one film."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIZE, N_COLOURS = 360, 256


def film(path: Path, model: Any, qpos: np.ndarray, robot: str, colours: np.ndarray, view: dict[str, Any], fps: float) -> None:
    """
    Write an animation in which a robot is in several places at once, each in its own colour.

    :param path: GIF to write
    :param model: MuJoCo's model
    :param qpos: Joint positions, shape (n_robots, n_frames, nq)
    :param robot: Body that the robot's others hang on
    :param colours: RGBA of each robot, shape (n_robots, 4) or (n_robots, n_frames, 4)
    :param view: Attributes of MuJoCo's camera
    :param fps: Frames per second
    """
    import mujoco
    from PIL import Image

    data, option, nothing = mujoco.MjData(model), mujoco.MjvOption(), mujoco.MjvPerturb()
    root = model.body(robot).rootid[0]
    dynamic = mujoco.mjtCatBit.mjCAT_DYNAMIC.value
    camera = mujoco.MjvCamera()
    for name, value in view.items():
        setattr(camera, name, value)
    colours = np.broadcast_to(colours if np.ndim(colours) == 3 else colours[:, None], (*qpos.shape[:2], 4))
    frames: list[Any] = []
    with mujoco.Renderer(model, SIZE, SIZE) as renderer:
        # they take most of the time where there is no graphics card
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        for frame in range(qpos.shape[1]):
            for i, (place, colour) in enumerate(zip(qpos[:, frame], colours[:, frame], strict=True)):
                data.qpos[:] = place
                mujoco.mj_forward(model, data)
                if i == 0:
                    n_there = 0
                    renderer.update_scene(data, camera)
                else:
                    n_there = renderer.scene.ngeom
                    mujoco.mjv_addGeoms(model, data, option, nothing, dynamic, renderer.scene)
                paint(renderer.scene.geoms[n_there : renderer.scene.ngeom], model, root, colour)
            frames.append(Image.fromarray(renderer.render()).quantize(N_COLOURS))
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def paint(geoms: Sequence[Any], model: Any, root: int, colour: Any) -> None:
    """Those of a robot in one colour, without their textures."""
    for geom in geoms:
        if model.body_rootid[model.geom_bodyid[geom.objid]] == root:
            geom.matid, geom.rgba = -1, colour
