// Prompts to begin with: code for a model that completes it, questions for an assistant.
import { byId, el } from "./dom.js";

const CODE = [
  ["Load a config", "def load_config(path):\n"],
  ["A test case", "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def setUp(self):\n"],
  ["Command line", "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser()\n"],
  ["A data class", "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def __eq__(self, other):\n"],
];
const CODE_CHAT = [
  ["Add two numbers", "Write a function that adds two numbers."],
  ["Read a file", "def read_lines(path):"],
];
const ASSISTANT = [
  ["Explain", "Explain in five sentences how a hash table works."],
  ["Sum", "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell in April and May together?"],
  ["Code", "Write a Python function that merges two sorted lists, with a docstring."],
];

/** Examples for a kind of model and request. */
export function examplesFor(isAssistant, mode) {
  if (mode === "chat") return isAssistant ? ASSISTANT : CODE_CHAT;
  return CODE;
}

/** Buttons in `box` that put an example into `field`. */
export function offerExamples(box, field, examples) {
  byId(box).replaceChildren(
    ...examples.map(([name, prompt]) => el("button", { type: "button", onclick: () => {
      byId(field).value = prompt;
      byId(field).dispatchEvent(new Event("input", { bubbles: true }));
    } }, name)),
  );
}
