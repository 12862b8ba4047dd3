"""`relora generate RUN_OR_FOLDER --prompt ...`: let a model write."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import FolderPath, VerbArguments, parse
from relora.cli.output import print_json, stdout_for_result
from relora.errors import ConfigError
from relora.train.checks import type_problems, unmet


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(VerbArguments):
    """Continue a prompt with a run or a model folder."""

    path: FolderPath
    """A run's folder, a checkpoint, or a model folder in Hugging Face form."""
    prompt: str = ""
    """Text to continue; empty starts as a new document does."""
    max_new_tokens: int = 128
    """Most tokens to add; the model may end its document sooner."""
    temperature: float = 0.8
    """Spread of the choice among tokens; 0 always takes the likeliest."""
    seed: int = 0
    """Seed of that choice: the same one gives the same text."""

    def violations(self) -> list[str]:
        """Return what is wrong with these arguments, in words."""
        return type_problems(self) or unmet(
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}"),
            (
                0 <= self.temperature < 100,
                f"temperature must be at least 0 and below 100, not {self.temperature:g}",
            ),
            (0 <= self.seed < 2**63, f"seed must be between 0 and 2^63 - 1, not {self.seed}"),
        )


def run(words: Sequence[str]) -> int:
    """Generate, and print the text."""
    arguments = parse(GenerateArguments, words, verb="generate")
    if violations := arguments.violations():
        raise ConfigError.from_violations("generate", violations)
    with stdout_for_result(only_json=arguments.json):
        from relora.train.generate import generate_from

        text = generate_from(
            arguments.path,
            prompt=arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    if arguments.json:
        print_json({"path": arguments.path, "prompt": arguments.prompt, "text": text})
    else:
        print(text)
    return 0
