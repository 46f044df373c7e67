"""Agents in files: the zip of Stable-Baselines3, with trust or without, and a file of tensors that needs none."""

import io
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_softq.checks import check_flag
from sb3_softq.serialization.agent import Contents, is_safetensors, read_agent, write_agent
from sb3_softq.serialization.objects import KnownObjects
from sb3_softq.serialization.untrusted import NoMoreNumbers, n_bytes, objects_without_unpickling

SelfSaved = TypeVar("SelfSaved", bound="SafelySaved")


class SafelySaved(OffPolicyAlgorithm):
    """Off-policy algorithm whose agents can be saved, and loaded, without code that a file could bring along."""

    # Dataclasses among the attributes, whose fields JSON can hold
    saved_dataclasses: ClassVar[dict[str, type]] = {}

    @classmethod
    def _objects(cls) -> KnownObjects:
        """What the attributes may be made of in a file of tensors."""
        policies = [x for parent in cls.__mro__ for x in vars(parent).get("policy_aliases", {}).values()]
        return KnownObjects(classes=policies, instances=cls.saved_dataclasses.values())

    @classmethod
    def _read_safetensors(cls, path: str | Path) -> Contents:
        return read_agent(path, [parent.__name__ for parent in cls.__mro__], cls._objects())

    @classmethod
    def _read_parameters(cls, load_path_or_dict: str | Path | TensorDict, device: th.device | str) -> TensorDict:
        """Parameters as ``set_parameters`` takes them, of a file if it is the name of one."""
        if isinstance(load_path_or_dict, dict):
            return load_path_or_dict
        if is_safetensors(load_path_or_dict):
            return cls._read_safetensors(load_path_or_dict).params
        return load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters, in a zip-file as Stable-Baselines3 does, or in a file
        of tensors and JSON if ``path`` ends in ``.safetensors``: loading that one runs no code, whoever made it
        (:mod:`sb3_softq.serialization.agent`).

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises ValueError: if a file of tensors cannot hold an attribute, such as a function, naming it
        """
        if not is_safetensors(path):
            super().save(path, exclude, include)
            return
        networks, variables = self._get_torch_save_params()
        left_out = {*self._excluded_save_params(), *(exclude or ())} - set(include or ())
        left_out |= {name.partition(".")[0] for name in (*networks, *variables)}
        data = {name: x for name, x in vars(self).items() if name not in left_out}
        contents = Contents(data, self.get_parameters(), {name: getattr(self, name) for name in variables})
        write_agent(path, type(self).__name__, contents, self._objects())

    @classmethod
    def load(
        cls: type[SelfSaved],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = True,
        **kwargs: Any,
    ) -> SelfSaved:
        """
        Load the model from a zip-file, as Stable-Baselines3 does. Loading a file that somebody else made can run what they put
        into it; with ``trusted=False`` it does not: nothing is unpickled. Then ``env`` (or ``custom_objects``) gives the
        spaces, the policy is one of the algorithm's own, ``train_freq`` is 1 unless it is given, training goes on in a new
        episode, and what else is pickled is refused by name.

        :param path: path to the file (or a file-like) where to load the agent from; one that ends in ``.safetensors`` holds
            tensors and JSON and runs nothing, whatever ``trusted`` is
        :param env: the new environment to run the loaded model on (can be None if you only need prediction from a trained
            model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading, which are not unpickled
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param trusted: Whether the file may be unpickled
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        :raises ValueError: if ``trusted=False`` and something in the file cannot be had without unpickling, or if a file that
            needs no trust asks for larger networks than it holds weights for
        """
        check_flag("trusted", trusted)
        at_most: AbstractContextManager[Any] = nullcontext()
        if is_safetensors(path):
            at_most = NoMoreNumbers(path, Path(path).stat().st_size)
            data, params, variables = cls._read_safetensors(path)
            # what Stable-Baselines3 loads
            zipped = io.BytesIO()
            save_to_zip_file(zipped, data | (custom_objects or {}), params, variables)
            path, custom_objects = zipped, None
        elif not trusted:
            vec_env = None if env is None else cls._wrap_env(env)
            custom_objects = objects_without_unpickling(
                cls, path, vec_env, custom_objects or {}, kwargs, cls.saved_dataclasses
            )
            at_most = NoMoreNumbers(path, n_bytes(path))
        with at_most:
            try:
                return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
            except KeyError as error:
                # Stable-Baselines3 takes any ValueError of set_parameters for that of an old DQN, and looks for its optimizer
                if isinstance(error.__context__, ValueError):
                    raise error.__context__ from None
                raise
