import type { Audience } from "./gen/connect_node_pb.js";
import { Rooms } from "./message.js";

/** The two sides of a stream do not mean the same any more. */
export class BrokenStream extends Error {}

interface Known {
  version: number;
  readonly room: string;
  /** Several in place of room. */
  readonly rooms: Rooms | undefined;
  readonly members: Set<string>;
}

/** What one stream has been told about rooms. */
export class Audiences {
  private readonly byId = new Map<number, Known>();
  private members = 0;

  constructor(private readonly maxMembers: number) {}

  /** Brings the audience that a delivery names to the delivery's version. */
  apply(a: Audience): { room: string; rooms: Rooms | undefined; members: ReadonlySet<string> } {
    if (a.id === 0) throw new BrokenStream("audience: id 0");
    const known = this.byId.get(a.id);
    if (known === undefined) return this.define(a);
    const changes = a.join.length > 0 || a.leave.length > 0;
    if (a.roomId !== "" || a.roomIds.length > 0) throw new BrokenStream(`audience ${a.id}: defined twice`);
    if (a.version === known.version && !changes) return known;
    if (a.version !== known.version + 1 || !changes) throw new BrokenStream(`audience ${a.id}: version ${a.version} after ${known.version}`);
    known.version++;
    for (const user of a.leave) {
      if (!known.members.delete(user)) throw new BrokenStream(`audience ${a.id}: ${JSON.stringify(user)} leaves and is no member`);
      this.members--;
    }
    this.add(a, known);
    return known;
  }

  /** Frees an audience. Unknown ids are none to free. */
  forget(id: number): void {
    const known = this.byId.get(id);
    if (known === undefined) return;
    this.members -= known.members.size;
    this.byId.delete(id);
  }

  private define(a: Audience): Known {
    if (a.version !== 1) throw new BrokenStream(`audience ${a.id}: not defined, version ${a.version}`);
    if (a.leave.length > 0) throw new BrokenStream(`audience ${a.id}: leave in a definition`);
    if (a.roomId !== "" && a.roomIds.length > 0) throw new BrokenStream(`audience ${a.id}: room_id and room_ids`);
    const known: Known = { version: 1, room: a.roomId, rooms: a.roomIds.length > 0 ? new Rooms(a.roomIds) : undefined, members: new Set() };
    this.add(a, known);
    this.byId.set(a.id, known);
    return known;
  }

  private add(a: Audience, known: Known): void {
    if (a.join.length > this.maxMembers - this.members) throw new BrokenStream(`audience: more than ${this.maxMembers} members on this stream`);
    for (const user of a.join) {
      if (known.members.has(user)) throw new BrokenStream(`audience ${a.id}: ${JSON.stringify(user)} joins and is a member`);
      known.members.add(user);
      this.members++;
    }
  }
}
