"""A ROS 2 node that filters the commands of a robot by an exported shield.

    ros2 run NAME shield_node --ros-args -p graph:=shield.onnx

It listens to `observation` and `command_proposed` (std_msgs/Float32MultiArray), and publishes
`command` (what to execute) and `shield/accepted`, `shield/certified` and `shield/valid`
(std_msgs/Bool). The observation must have the entries that the shield was trained on, in their
order and units.

The node decides when a command is proposed. Without an observation, or with one that is older than
`max_age` seconds, it passes NaN to the graph. The shield does not accept a command then: it
executes its fallback, and `shield/valid` is False. A promise of the record holds for the control
rate, the sensors and the policy of the calibration, and for nothing else.

The file needs ROS 2 (rclpy, std_msgs), ONNX Runtime and NumPy, and has been parsed, not run: no ROS
was at hand.
"""

from __future__ import annotations

import json
import math

import numpy as np
import onnxruntime
import rclpy
from rclpy.node import Node
from std_msgs.msg import Bool, Float32MultiArray

OUTPUTS = ["action_executed", "accepted", "certified", "valid"]


class ShieldNode(Node):
    """Replaces proposed commands that the shield does not accept."""

    def __init__(self) -> None:
        super().__init__("safeshield")
        self.declare_parameter("graph", "shield.onnx")
        self.declare_parameter("max_age", 0.1)
        self._max_age = float(self.get_parameter("max_age").value)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = str(self.get_parameter("graph").value)
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        contents = json.loads(self._session.get_modelmeta().custom_metadata_map["safeshield"])
        self.get_logger().info(f"shield {contents['shield']}, promise: {contents['promise']}")
        shapes = {one.name: one.shape for one in self._session.get_inputs()}
        if set(shapes) != {"observation", "action"}:
            raise ValueError(
                f"the graph must have the inputs observation and action, got {sorted(shapes)}"
            )
        self._widths = {name: int(shape[-1]) for name, shape in shapes.items()}
        self._seen, self._seen_at = np.full(self._widths["observation"], np.nan, np.float32), None
        self._command = self.create_publisher(Float32MultiArray, "command", 1)
        self._flags = {
            name: self.create_publisher(Bool, f"shield/{name}", 1) for name in OUTPUTS[1:]
        }
        self.create_subscription(Float32MultiArray, "observation", self._observe, 1)
        self.create_subscription(Float32MultiArray, "command_proposed", self._filter, 1)

    def _observe(self, message: Float32MultiArray) -> None:
        seen = np.asarray(message.data, np.float32)
        if seen.shape != self._seen.shape:
            self.get_logger().error(
                f"the observation must have {len(self._seen)} entries, got {len(seen)}"
            )
            seen = np.full_like(self._seen, np.nan)
        self._seen, self._seen_at = seen, self.get_clock().now()

    def _filter(self, message: Float32MultiArray) -> None:
        action = np.asarray(message.data, np.float32)
        if action.shape != (self._widths["action"],):
            self.get_logger().error(
                f"the command must have {self._widths['action']} entries, got {len(action)}"
            )
            action = np.full(self._widths["action"], np.nan, np.float32)
        feed = {"observation": self._fresh()[None], "action": action[None]}
        executed, *flags = self._session.run(OUTPUTS, feed)
        self._command.publish(Float32MultiArray(data=executed[0].tolist()))
        for (name, publisher), flag in zip(self._flags.items(), flags, strict=True):
            publisher.publish(Bool(data=bool(flag[0])))
            if name == "valid" and not flag[0]:
                self.get_logger().warning("the fallback acts: no usable observation or command")

    def _fresh(self) -> np.ndarray:
        """Return the last observation, or NaN where it is missing or too old."""
        age = math.inf
        if self._seen_at is not None:
            age = (self.get_clock().now() - self._seen_at).nanoseconds * 1e-9
        return self._seen if age <= self._max_age else np.full_like(self._seen, np.nan)


def main() -> None:
    """Run the node until it is interrupted."""
    rclpy.init()
    node = ShieldNode()
    try:
        rclpy.spin(node)
    finally:
        node.destroy_node()
        rclpy.shutdown()


if __name__ == "__main__":
    main()
