import { BrokenStream } from "./audiences.js";
import type { Delivery } from "./gen/connect_node_pb.js";
import type { Match } from "./gen/message_pb.js";

/** What a client, or better its token, says of a connection, such as device_id, platform and app_version. */
export type Attributes = Readonly<Record<string, string>>;

/** Bounds of the protocol. */
const maxAttributes = 16;
const maxBytes = 64;
const maxMatches = 8;
const maxValues = 32;

// eslint-disable-next-line no-control-regex
const control = /[\u0000-\u001f\u007f-\u009f]/;

/** A copy of what was given. Throws a RangeError that names what is none. */
export function attributesOf(given: Attributes): ReadonlyMap<string, string> {
  const all = Object.entries(given);
  if (all.length > maxAttributes) throw new RangeError(`attributes: ${all.length}, more than ${maxAttributes}`);
  for (const [key, value] of all) {
    checkText(`attributes: key ${JSON.stringify(key.slice(0, maxBytes))}`, key, maxBytes);
    checkText(`attributes[${JSON.stringify(key)}]`, value, maxBytes);
  }
  return new Map(all);
}

/** Throws a RangeError that names what is wrong with an id or the like. */
export function checkText(field: string, text: string, most: number): void {
  if (typeof text !== "string" || text === "") throw new RangeError(`${field}: must not be empty`);
  if (Buffer.byteLength(text) > most) throw new RangeError(`${field}: more than ${most} bytes`);
  if (!text.isWellFormed() || control.test(text)) throw new RangeError(`${field}: must be valid UTF-8 without control characters`);
}

/** Whether a push with this filter is for a connection: an attribute that it does not have has no value, and so holds for a "not". */
export function matches(filter: readonly Match[], attributes: ReadonlyMap<string, string>): boolean {
  return filter.every((m) => {
    const value = attributes.get(m.key);
    return (value !== undefined && m.values.includes(value)) !== m.not;
  });
}

/** Refuses what no manager sends. */
export function checkFilter(d: Delivery): void {
  if (d.filter.length === 0) return;
  if (d.filter.length > maxMatches) throw new BrokenStream(`filter: ${d.filter.length} matches, more than ${maxMatches}`);
  if (d.replay !== undefined || d.log !== undefined) throw new BrokenStream("filter: beside replay or log");
  for (const [i, m] of d.filter.entries()) {
    if (m.key === "" || m.values.length === 0) throw new BrokenStream(`filter: match ${i}: needs a key and values`);
    if (m.values.length > maxValues) throw new BrokenStream(`filter: match ${i}: ${m.values.length} values, more than ${maxValues}`);
  }
}
