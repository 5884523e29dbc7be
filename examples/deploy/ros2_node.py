"""A ROS 2 node that filters the commands of a robot by an exported shield.

    ros2 run NAME shield_node --ros-args -p graph:=shield.onnx

It listens to `observation` and `command_proposed` (std_msgs/Float32MultiArray), and publishes
`command` (what to execute) and `shield/accepted`, `shield/certified` and `shield/valid`
(std_msgs/Bool). The observation must have the entries that the shield was trained on, in their
order and units. Where the graph has the input "constraint", the node also listens to `constraint`
(std_msgs/Float64), which is h of the present state.

The node decides when a command is proposed. Without an observation or a constraint, or with one
that is older than `max_age` seconds, it passes NaN to the graph. The shield does not accept a
command then: it executes its fallback. `shield/valid` is False where the observation or the command
cannot be used. A promise of the record holds for the control rate, the sensors and the policy of
the calibration, and for nothing else.

The file needs ROS 2 (rclpy, std_msgs), ONNX Runtime and NumPy. It has been run with stand-ins for
rclpy and std_msgs, not inside ROS.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import rclpy
from rclpy.node import Node
from std_msgs.msg import Bool, Float32MultiArray, Float64

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
        rows = {"observation", "action"}
        if set(shapes) - {"constraint"} != rows or any(len(shapes[name]) != 2 for name in rows):
            raise ValueError(
                "the graph must have rows of observations and of actions as inputs, and at most "
                f"one constraint, got the inputs {sorted(shapes)}"
            )
        self._widths = {name: int(shapes[name][1]) for name in rows}
        self._latest = {}
        """The latest message of each topic as an array, with its time in ns."""
        self._command = self.create_publisher(Float32MultiArray, "command", 1)
        self._flags = {
            name: self.create_publisher(Bool, f"shield/{name}", 1) for name in OUTPUTS[1:]
        }
        self._has_constraint = "constraint" in shapes
        if self._has_constraint:
            self.create_subscription(Float64, "constraint", self._constrain, 1)
        self.create_subscription(Float32MultiArray, "observation", self._observe, 1)
        self.create_subscription(Float32MultiArray, "command_proposed", self._filter, 1)

    def _observe(self, message: Float32MultiArray) -> None:
        self._keep("observation", self._row("observation", message))

    def _constrain(self, message: Float64) -> None:
        self._keep("constraint", np.array([message.data], np.float64))

    def _keep(self, name: str, value: np.ndarray) -> None:
        self._latest[name] = value, self.get_clock().now().nanoseconds

    def _row(self, name: str, message: Float32MultiArray) -> np.ndarray:
        """Return the message as a row (1, width), which is NaN where its length is wrong."""
        row, width = np.asarray(message.data, np.float32), self._widths[name]
        if row.shape != (width,):
            self.get_logger().error(f"the {name} must have {width} entries, got {row.size}")
            row = np.full(width, np.nan, np.float32)
        return row[None]

    def _filter(self, message: Float32MultiArray) -> None:
        nothing = np.full((1, self._widths["observation"]), np.nan, np.float32)
        feed = {
            "action": self._row("action", message),
            "observation": self._fresh("observation", nothing),
        }
        if self._has_constraint:
            feed["constraint"] = self._fresh("constraint", np.array([np.nan]))
        executed, *flags = self._session.run(OUTPUTS, feed)
        self._command.publish(Float32MultiArray(data=executed[0].tolist()))
        for (name, publisher), flag in zip(self._flags.items(), flags, strict=True):
            publisher.publish(Bool(data=bool(flag[0])))
            if name == "valid" and not flag[0]:
                self.get_logger().warning("the fallback acts: no usable observation or command")

    def _fresh(self, name: str, nothing: np.ndarray) -> np.ndarray:
        """Return the latest value of a topic, or `nothing` where it is missing or too old."""
        value, at = self._latest.get(name, (nothing, 0))
        age = (self.get_clock().now().nanoseconds - at) * 1e-9
        return value if age <= self._max_age else nothing


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
