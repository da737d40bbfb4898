import { createHash } from "node:crypto";
import { create, toBinary } from "@bufbuild/protobuf";
import { status } from "@grpc/grpc-js";
import {
  ConnectionSchema, ListConnectionsResponseSchema, ListUsersResponseSchema, UserConnectionsSchema,
  type ListConnectionsRequest, type ListConnectionsResponse, type ListUsersRequest, type ListUsersResponse,
} from "./gen/connect_node_pb.js";
import type { Session } from "./session.js";
import { StreamEnd, tenantScope } from "./stream.js";

/** Of an answer. A manager takes frames of 1 MiB. */
const mostUsers = 10_000;
const mostBytes = 900 << 10;
/** So many users are looked at before others have their turn in the event loop: some 5 ms. */
const atOnce = 2000;
/** Of a call for connections, and of one user in its answer. */
const mostAsked = 1000;
const mostConnections = 100;
const lastTurn = 0xffff_ffff_ffff_ffffn;

/** When a broadcast job comes to a user: the first 8 bytes of SHA-256 over the id, big-endian, as proto/README.md says. */
function turnOf(user: string): bigint {
  return createHash("sha256").update(user).digest().readBigUInt64BE(0);
}

interface InTurn {
  turn: bigint;
  user: string;
}

/** Answers ListUsers, one call after the other: each looks at all users. And ListConnections. */
export class Listing {
  private before: Promise<unknown> = Promise.resolve();

  constructor(private readonly users: ReadonlyMap<string, readonly Session[]>) {}

  list(r: ListUsersRequest): Promise<ListUsersResponse> {
    if (r.scope !== "" && !tenantScope.test(r.scope)) throw new StreamEnd(status.INVALID_ARGUMENT, "scope: must be the name of a tenant and a slash");
    const answer = this.before.then(() => this.look(r));
    this.before = answer.catch(() => undefined);
    return answer;
  }

  private async look(r: ListUsersRequest): Promise<ListUsersResponse> {
    const limit = r.limit > 0 ? Math.min(r.limit, mostUsers) : mostUsers;
    let line: InTurn[] = [];
    let last = lastTurn;
    /** Keeps the first n, and whoever has the same turn as the last of them. */
    const cut = (n: number): void => {
      line = line.filter((u) => u.turn <= last).sort((a, b) => (a.turn < b.turn ? -1 : a.turn > b.turn ? 1 : 0));
      while (n < line.length && line[n]!.turn === line[n - 1]!.turn) n++;
      if (n >= line.length) return;
      line.length = n;
      last = line[n - 1]!.turn;
    };
    let looked = 0;
    for (const user of [...this.users.keys()]) {
      if (++looked % atOnce === 0) await new Promise((go) => setImmediate(go));
      if (!user.startsWith(r.scope)) continue;
      const turn = turnOf(user);
      if (turn < r.firstTurn || turn > last) continue;
      if (line.push({ turn, user }) >= 4 * limit + 64) cut(limit);
    }
    cut(limit);
    let size = 0;
    const whole = line.findIndex((u) => (size += Buffer.byteLength(u.user) + 4) > mostBytes);
    if (whole >= 0) cut(Math.max(whole, 1));
    return create(ListUsersResponseSchema, { userIds: line.map((u) => u.user), lastTurn: last });
  }

  /** Which connections users have, in the order of the request: those of the first ones, if there is no place for all. */
  connections(r: ListConnectionsRequest): ListConnectionsResponse {
    if (r.userIds.length === 0 || r.userIds.length > mostAsked) {
      throw new StreamEnd(status.INVALID_ARGUMENT, `user_ids: ${r.userIds.length}, and has to be 1 to ${mostAsked}`);
    }
    const reply = create(ListConnectionsResponseSchema);
    let size = 0;
    for (const user of r.userIds) {
      const u = create(UserConnectionsSchema);
      let bytes = 8;
      let full = false;
      for (const s of this.users.get(user) ?? []) {
        const c = create(ConnectionSchema, {
          connectionId: s.id, deviceId: s.device, attributes: Object.fromEntries(s.attributes), roomIds: [...s.rooms], connectedAt: BigInt(Math.floor(s.since / 1000)),
        });
        const n = toBinary(ConnectionSchema, c).length + 8;
        full = size + bytes + n > mostBytes;
        if (full || u.connections.length === mostConnections) {
          u.more = true;
          break;
        }
        u.connections.push(c);
        bytes += n;
      }
      if (full && reply.users.length > 0) break; // There is place for it in the next answer.
      reply.users.push(u);
      size += bytes;
    }
    return reply;
  }
}
